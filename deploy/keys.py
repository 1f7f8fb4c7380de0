"""Makes an API key: prints it once, for its owner, and its hash, for the configuration.

python -m deploy.keys alice
"""

import argparse
import secrets

from deploy.api.auth import hash_key


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.keys", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="whose key it is; appears in the access log")
    name = parser.parse_args().name
    key = f"mf-{secrets.token_urlsafe(32)}"
    print(f"key for {name}, shown this once:  {key}")
    print("under user_config of the deployment Api:")
    print(f'  api_keys: {{{name}: "{hash_key(key)}"}}')


if __name__ == "__main__":
    main()
