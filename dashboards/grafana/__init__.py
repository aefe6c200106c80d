"""The Grafana dashboards as code: ``parts`` is what they are made of, and there is a module for each of them."""
