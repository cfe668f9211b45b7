"""One training loop, written for each of the systems compared. Every rank appends a line to its log after each step."""
