//! Text of bearer tokens, in the forms that callers' libraries demand. All forms of a token have the
//! same public id and the same secret.

/// Hex digits of the public id.
pub const ID_DIGITS: usize = 12;
/// Hex digits of the secret.
pub const SECRET_DIGITS: usize = 64;

/// Form of a token's text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Format {
    /// `pvesb_ID_SECRET`, with which scanners of repositories find a token.
    #[default]
    Plain,
    /// `e2b_` and hex digits only, as the libraries of E2B demand it.
    E2b,
}

impl Format {
    /// Every form.
    pub const ALL: [Self; 2] = [Self::Plain, Self::E2b];

    /// Returns the name for `--format`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::E2b => "e2b",
        }
    }

    /// Returns the form with this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }

    /// Returns the text of a token.
    pub fn text(self, id: &str, secret: &str) -> String {
        match self {
            Self::Plain => format!("{PLAIN}{id}_{secret}"),
            Self::E2b => format!("{E2B}{id}{secret}"),
        }
    }
}

const PLAIN: &str = "pvesb_";
const E2B: &str = "e2b_";

/// Splits a token's text, in any form, into id and secret; `None` when it does not have one.
pub fn split(text: &str) -> Option<(&str, &str)> {
    let (id, secret) = match text.strip_prefix(PLAIN) {
        Some(rest) => rest.split_once('_')?,
        None => text.strip_prefix(E2B)?.split_at_checked(ID_DIGITS)?,
    };
    let hex = |text: &str, digits: usize| {
        text.len() == digits
            && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    (hex(id, ID_DIGITS) && hex(secret, SECRET_DIGITS)).then_some((id, secret))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_splits_into_the_same_parts() {
        let (id, secret) = ("0123456789ab", "f".repeat(SECRET_DIGITS));
        for format in Format::ALL {
            assert_eq!(split(&format.text(id, &secret)), Some((id, secret.as_str())));
            assert_eq!(Format::named(format.name()), Some(format));
        }
        let e2b = Format::E2b.text(id, &secret);
        let digits = e2b.strip_prefix("e2b_").expect("the form");
        assert!(digits.bytes().all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase()));
    }

    #[test]
    fn malformed_tokens_are_refused() {
        let long = "0".repeat(ID_DIGITS + SECRET_DIGITS);
        for text in
            ["", "pvesb_", "pvesb_a_b", "Bearer x", "pvesb_00_00\n", "e2b_", "e2b_ä", "e2b_00"]
        {
            assert_eq!(split(text), None, "{text:?}");
        }
        for text in
            [format!("e2b_{long}0"), format!("e2b_{}g", &long[1..]), format!("pvesb_{long}")]
        {
            assert_eq!(split(&text), None, "{text:?}");
        }
    }
}
