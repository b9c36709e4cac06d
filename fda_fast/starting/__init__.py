"""Starting points of a merge: Task Arithmetic, TSV-M, WUDI."""
