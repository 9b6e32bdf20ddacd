"""Exact frames of video files, by PyAV or decord, in this process or one of its own."""
