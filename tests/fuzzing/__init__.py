"""What ``test_fuzz.py`` draws, and what it checks of that."""
