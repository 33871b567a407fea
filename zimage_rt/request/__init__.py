"""What is asked for, checked against the bundle."""
