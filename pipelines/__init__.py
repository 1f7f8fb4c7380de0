"""The cluster jobs: encode, train, evaluate. What starts and finishes; what stays up lives in `deploy`."""
