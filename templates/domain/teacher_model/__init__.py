"""What a teacher is and where it comes from."""
