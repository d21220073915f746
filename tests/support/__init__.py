"""What the tests stand on and do not test."""
