"""What other engines load of this package, through entry points; nothing here is imported unless an engine asks."""
