"""The tests: one folder per package of the project, a file per module; helpers and fixtures apart."""
