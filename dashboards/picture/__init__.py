"""A dashboard drawn from a real run's data: ``charts`` draws, ``__main__`` has a run to draw from."""
