"""Offline scoring: folders of sessions in, folders of ranked items out."""
