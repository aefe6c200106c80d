"""Dashboards, alert rules and their configuration: made from code, written as files for Grafana and Prometheus."""
