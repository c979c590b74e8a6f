"""What keeps the repository in order, and machines that tests stand in for: nothing here serves."""
