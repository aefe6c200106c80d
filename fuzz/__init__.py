"""What reads hostile input, fed with hostile input."""
