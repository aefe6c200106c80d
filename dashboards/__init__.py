"""Dashboards, alert rules and their configuration: made from code, written as the files that Grafana and Prometheus read."""
