"""The browser's side: cohort table, viewer, session clock."""
