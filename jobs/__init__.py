"""The floor above both wings: Ray, the command line and configuration files."""
