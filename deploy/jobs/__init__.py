"""A short file per stage, and a thin command that submits, follows and stops them: `python -m deploy.jobs`.

job_file: what such a file says, and errors in plain words;  __main__: the command, over Ray's own client.
"""
