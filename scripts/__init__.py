"""What the make targets do that is more than a line of a Makefile."""
