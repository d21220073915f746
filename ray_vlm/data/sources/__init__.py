"""Where rows come from: files of rows, and one reader for each format that turns them into records."""
