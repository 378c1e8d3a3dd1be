"""What several test files share, by what it is about; test files never import from each other."""
