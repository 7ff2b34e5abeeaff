//! Path and query of a request, with the credentials in it. Pure, and total over any bytes.

/// Query parameter with a link.
pub(super) const LINK: &[u8] = b"sbx_link";
/// Query parameter with a token.
pub(super) const TOKEN: &[u8] = b"sbx_token";

/// Path and query, as the client sent them. Nothing is decoded: a parameter whose name is written in another way is
/// the sandbox's own.
#[derive(Debug, Clone, Copy)]
pub(super) struct Uri<'a> {
    path: &'a [u8],
    query: &'a [u8],
}

impl<'a> Uri<'a> {
    pub(super) fn new(uri: &'a [u8]) -> Self {
        match uri.iter().position(|&byte| byte == b'?') {
            Some(at) => Self { path: &uri[..at], query: &uri[at + 1..] },
            None => Self { path: uri, query: b"" },
        }
    }

    fn parts(&self) -> impl Iterator<Item = &'a [u8]> {
        self.query.split(|&byte| byte == b'&')
    }

    /// Returns the first value of a parameter.
    pub(super) fn value(&self, name: &[u8]) -> Option<&'a [u8]> {
        self.parts().find_map(|part| part.strip_prefix(name)?.strip_prefix(b"="))
    }

    /// Number of parameters that are ours.
    pub(super) fn credentials(&self) -> usize {
        self.parts().filter(|part| is_ours(part)).count()
    }

    /// Returns the URI without the parameters that are ours, as a reference to this host and no other. Bytes that a
    /// header cannot hold lead to the root.
    pub(super) fn without_credentials(&self) -> String {
        // `//other.example/` would be another host.
        let slash = |byte: &u8| matches!(byte, b'/' | b'\\');
        let start = self.path.iter().position(|byte| !slash(byte)).unwrap_or(self.path.len());
        let query: Vec<_> = self.parts().filter(|part| !is_ours(part)).collect();
        let query = query.join(b"&".as_slice());
        let mark: &[u8] = if query.is_empty() { b"" } else { b"?" };
        let clean = [b"/", &self.path[start..], mark, &query].concat();
        let plain = clean.iter().all(|byte| byte.is_ascii_graphic());
        if plain { String::from_utf8_lossy(&clean).into_owned() } else { "/".to_owned() }
    }

    /// Returns the text to remove from the query, so that the one parameter of ours is gone; `None` when there is
    /// none, or one of bytes that no credential has.
    pub(super) fn credential_to_remove(&self) -> Option<String> {
        let at = self.parts().position(is_ours)?;
        let part = self.parts().nth(at)?;
        let text = std::str::from_utf8(part).ok()?;
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return None;
        }
        let count = self.parts().count();
        Some(match (at, count) {
            (_, 1) => text.to_owned(),
            (0, _) => format!("{text}&"),
            _ => format!("&{text}"),
        })
    }
}

fn is_ours(part: &[u8]) -> bool {
    let name = part.split(|&byte| byte == b'=').next().unwrap_or_default();
    name == LINK || name == TOKEN
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn clean(uri: &str) -> String {
        Uri::new(uri.as_bytes()).without_credentials()
    }

    #[test]
    fn credentials_are_taken_out_of_the_query_alone() {
        for (uri, expected) in [
            ("/", "/"),
            ("/?sbx_link=x", "/"),
            ("/a/b?c=1&sbx_link=x&d=%2F+", "/a/b?c=1&d=%2F+"),
            ("/?sbx_token=x&a=1", "/?a=1"),
            ("/?a=1&sbx_token=x", "/?a=1"),
            ("/?sbx_token=x&sbx_token=y&sbx_link=z", "/"),
            ("/?sbx_token", "/"),
            ("/sbx_token=x?sbx_tokens=1", "/sbx_token=x?sbx_tokens=1"),
            ("/?a=?sbx_token=x", "/?a=?sbx_token=x"),
            ("//evil.example/x?sbx_link=x", "/evil.example/x"),
            ("/\\evil.example/x?sbx_link=x", "/evil.example/x"),
            ("\\/\\evil.example?sbx_link=x", "/evil.example"),
            ("http://evil.example/?sbx_link=x", "/http://evil.example/"),
            ("*", "/*"),
            ("", "/"),
            ("/a b?sbx_link=x", "/"),
        ] {
            assert_eq!(clean(uri), expected, "{uri}");
        }
    }

    #[test]
    fn value_and_what_to_remove_belong_together() {
        for (uri, removed, left) in [
            ("/?sbx_token=x", Some("sbx_token=x"), "/?"),
            ("/?sbx_token=x&a=1", Some("sbx_token=x&"), "/?a=1"),
            ("/?a=1&sbx_token=x", Some("&sbx_token=x"), "/?a=1"),
            ("/?a=1&sbx_token=x&b=2", Some("&sbx_token=x"), "/?a=1&b=2"),
            ("/?a=1", None, "/?a=1"),
        ] {
            let found = Uri::new(uri.as_bytes()).credential_to_remove();
            assert_eq!(found.as_deref(), removed, "{uri}");
            let text = found.map_or(uri.to_owned(), |found| uri.replace(&found, ""));
            assert_eq!(text, left, "{uri}");
        }
        assert_eq!(Uri::new(b"/?a=1&sbx_token=x=y").value(TOKEN), Some(b"x=y".as_slice()));
        assert_eq!(Uri::new(b"/?sbx_token").value(TOKEN), None);
    }

    proptest! {
        #[test]
        fn any_bytes_lead_to_this_host_without_credentials(uri in proptest::collection::vec(any::<u8>(), 0..80)) {
            let text = [uri.as_slice(), b"&sbx_token=x"].concat();
            for uri in [&uri, &text] {
                let uri = Uri::new(uri);
                let clean = uri.without_credentials();
                prop_assert!(clean.starts_with('/') && !clean.starts_with("//") && !clean.starts_with("/\\"));
                prop_assert!(clean.bytes().all(|byte| byte.is_ascii_graphic()));
                prop_assert_eq!(Uri::new(clean.as_bytes()).credentials(), 0);
                uri.credential_to_remove();
            }
        }
    }
}
