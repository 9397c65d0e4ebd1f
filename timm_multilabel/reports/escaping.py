"""Texts of the user's data, made harmless for the programs that open reports."""


def spreadsheet_text(text: str) -> str:
    """A cell of a CSV that spreadsheets show as it is: with a `'` before what they would compute as a formula.

    See https://owasp.org/www-community/attacks/CSV_Injection.
    """
    return f"'{text}" if text.startswith(('=', '+', '-', '@', '\t', '\r')) else text
