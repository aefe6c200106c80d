"""The demo: an embedded hub, an embedded bucket, and a real federated job between them."""
