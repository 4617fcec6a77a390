"""What is made of results: tables and live progress on the console."""
