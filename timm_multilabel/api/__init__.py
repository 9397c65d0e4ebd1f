"""The Python API: a public function a file; the command line calls the same."""
