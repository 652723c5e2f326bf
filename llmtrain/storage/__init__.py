"""Files on disk and behind URLs: complete or absent, verified, and clear errors if writing fails.

May import: errors.

- cache: the user's cache folder, and digests of large files in it.
- commit: atomic files and folders, clean-up after kills, locks.
- disk: errors of full, limited or read-only disks.
- hub: the Hugging Face hub.
- integrity: digests (BLAKE3, SHA-256) and the record of each committed folder.
- json_files: JSON documents, JSON Lines, the events of a run.
- run_folder: paths inside a run.
- urls: read, list, download and upload through fsspec.
"""
