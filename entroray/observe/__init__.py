"""What a run leaves behind for people: journal, token records, trackers, console lines, report."""
