"""Files on disk and behind URLs: complete or absent, verified, and clear errors if writing fails.

May import: errors.

Links: a run folder, a data folder and any folder above them may be symbolic links. Inside a run,
commands write only to real folders and to regular files with one name, and reject anything else, so
that an extracted run archive cannot redirect them. Temporary folders are used and deleted only if
they contain our marker. `scripts/attack_links` tests this.

- cache: the user's cache folder, and digests of large files in it.
- commit: atomic files and folders, clean-up after kills.
- disk: errors of full, limited or read-only disks.
- file_systems: flushes, new folders, and file systems that lack locks, permissions or flushes.
- hub: the Hugging Face hub.
- integrity: digests (BLAKE3, SHA-256) and the record of each committed folder.
- json_files: JSON documents, JSON Lines, the events of a run.
- locks: locked folders, and the check that a locked folder was not moved.
- run_folder: paths inside a run.
- safe_files: open, create and delete without following links.
- urls: read, list, download and upload through fsspec.
"""
