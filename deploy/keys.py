"""Creates an API key. Prints the key, for its owner, and its hash, for the endpoint's configuration.

meanflow keys alice
"""

import argparse
import secrets

from deploy.api.auth import hash_key


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(
        prog="meanflow keys", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="owner of the key; appears in the access log")
    name = parser.parse_args().name
    key = f"mf-{secrets.token_urlsafe(32)}"
    print(f"API key for {name} (shown only once): {key}")
    print(
        "start deploy.serve with --api-keys NAME HASH, or add this to user_config of Endpoint (of Api in topology two):"
    )
    print(f'  api_keys: {{{name}: "{hash_key(key)}"}}')


if __name__ == "__main__":
    main()
