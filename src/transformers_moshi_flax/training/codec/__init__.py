"""Training of Mimi: from recordings to a codec."""
