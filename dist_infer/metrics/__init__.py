"""What the endpoint counts and measures of itself, and how it is read from outside. No HTTP and no Ray in here."""
