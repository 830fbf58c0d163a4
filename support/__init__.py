"""No need to read these: files that appear whole, and what is said to people."""
