"""Read-ahead: which bytes coming crops need, and how they are requested from storage before they are needed."""
