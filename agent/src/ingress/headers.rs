//! Header names that a client must not send to a sandbox. Pure.
//!
//! Programs behind CGI, WSGI or PHP read header names without regard for case, and with every
//! separator as `_`: to them `X-Sbx_Kind`, `x_sbx-kind` and `X.Sbx.Kind` are one header. So each
//! name covers all of its spellings.

use super::decide::TOKENS;

/// Separators that such programs treat as equal.
const SEPARATORS: [char; 3] = ['-', '_', '.'];

/// Other characters that a header name may have, which no application's has. Programs behind CGI may read each of them
/// as `_`, too, so that a name with one takes the place of another.
const ODD: &str = "!#$%&'*+^`|~";

/// Prefixes of header names that belong to us or to the tunnel. Neither clients nor sandboxes may
/// send them.
const RESERVED: &[&str] = &["x-sbx", "cf-access", "cf-warp"];

/// Headers that an agent says to its Caddy, in the spelling that it uses.
const NAMED: &[&str] = &[
    "X-Sbx-Access",
    "X-Sbx-Ancestors",
    "X-Sbx-Host",
    "X-Sbx-Kind",
    "X-Sbx-Max-Age",
    "X-Sbx-Origin",
    "X-Sbx-Proof",
    "X-Sbx-Remove",
    "X-Sbx-Upstream",
    "X-Sbx-User",
];

/// Prefixes of header names that Caddy, or the tunnel in front of it, sets in this spelling. A
/// client's other spelling could take their place.
const SAID_FOR_THE_CLIENT: &[&str] = &["x-forwarded-", "x-request-id", "cf-", "cf-connecting-"];

/// Lists patterns for Caddy's `delete` that match our own headers.
pub(super) fn reserved() -> Vec<String> {
    RESERVED.iter().copied().flat_map(spellings).map(pattern).collect()
}

/// Lists patterns for all headers of a client that must not reach a sandbox. None of them matches a
/// header that Caddy sets itself.
pub(super) fn of_a_client() -> Vec<String> {
    let foreign = |name: &'static str| spellings(name).into_iter().filter(move |s| s != name);
    let said = SAID_FOR_THE_CLIENT.iter().copied().flat_map(foreign).map(pattern);
    let odd = ODD.chars().map(|odd| format!("*{odd}*"));
    // The second begins HTTP/2 on the connection, together with an upgrade, which is not passed on either.
    let others = ["Forwarded", "HTTP2-Settings"].map(str::to_owned);
    let mut all: Vec<_> = reserved().into_iter().chain(others).chain(odd).chain(said).collect();
    all.sort();
    all.dedup();
    all
}

/// Lists patterns for all headers of a client that must not reach a sandbox, credentials in headers with names of
/// other products among them.
pub(super) fn for_a_sandbox() -> Vec<String> {
    let credentials = TOKENS.into_iter().map(|name| name.as_str().to_owned());
    of_a_client().into_iter().chain(credentials).collect()
}

/// Lists patterns for all headers of a client that must not reach the Caddy of another node, which deletes all
/// of them again. Of our own, the token goes there: the sandbox's owner checks it.
pub(super) fn for_a_peer() -> Vec<String> {
    // Caddy's patterns have no exceptions, so those beside the token are named.
    let own = |pattern: &String| pattern == "x-sbx*";
    let named = NAMED.iter().map(|name| (*name).to_owned());
    of_a_client().into_iter().filter(|pattern| !own(pattern)).chain(named).collect()
}

fn pattern(beginning: String) -> String {
    beginning + "*"
}

/// Lists all spellings of a name, with each separator in every form.
fn spellings(name: &str) -> Vec<String> {
    name.chars().fold(vec![String::new()], |begun, next| {
        let forms: &[char] = if SEPARATORS.contains(&next) { &SEPARATORS } else { &[next] };
        let longer = |begun: &String| forms.iter().map(|form| format!("{begun}{form}")).collect();
        begun.iter().flat_map::<Vec<_>, _>(longer).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns true when Caddy's `delete` removes this header on its way to a sandbox.
    fn deleted(name: &str) -> bool {
        deleted_by(&for_a_sandbox(), name)
    }

    fn deleted_by(patterns: &[String], name: &str) -> bool {
        let name = name.to_ascii_lowercase();
        patterns.iter().any(|pattern| {
            let pattern = pattern.to_ascii_lowercase();
            let inner = pattern.strip_prefix('*').and_then(|pattern| pattern.strip_suffix('*'));
            match (inner, pattern.strip_suffix('*')) {
                (Some(part), _) => name.contains(part),
                (None, Some(beginning)) => name.starts_with(beginning),
                (None, None) => name == pattern,
            }
        })
    }

    #[test]
    fn every_spelling_of_a_reserved_header_is_deleted() {
        for one in SEPARATORS {
            for two in SEPARATORS {
                for name in ["Kind", "UPSTREAM", "proof", "User", ""] {
                    let name = format!("X{one}Sbx{two}{name}");
                    assert!(deleted(&name), "{name}");
                }
                let name = format!("CF{one}Access{two}Jwt{one}Assertion");
                assert!(deleted(&name), "{name}");
            }
        }
        for name in ["Forwarded", "Cf-Warp-Tag-Id", "cf-warp_tag_id", "x-SBX", "http2-settings"] {
            assert!(deleted(name), "{name}");
        }
    }

    /// A header name may have letters, digits and these characters (RFC 9110).
    #[test]
    fn no_separator_that_a_header_name_may_have_forges_one_of_ours() {
        for odd in "!#$%&'*+-.^_`|~".chars() {
            for name in ["X?Sbx?User", "CF?Access?Jwt?Assertion", "Cf?Warp?Tag?Id"] {
                let name = name.replace('?', &odd.to_string());
                assert!(deleted(&name) && deleted_by(&for_a_peer(), &name), "{name}");
            }
            for name in ["X?Forwarded?For", "X?Request?Id", "Cf?Connecting?Ip"] {
                let name = name.replace('?', &odd.to_string());
                assert_eq!(deleted(&name), odd != '-', "{name}");
            }
        }
    }

    #[test]
    fn tokens_reach_the_owner_and_no_sandbox() {
        for name in TOKENS {
            assert!(deleted(name.as_str()), "{name}");
            assert!(!deleted_by(&for_a_peer(), name.as_str()), "{name}");
        }
        for name in NAMED.iter().chain(&["x_sbx_token", "X-Forwarded_For", "Forwarded"]) {
            assert!(deleted_by(&for_a_peer(), name), "{name}");
        }
    }

    #[test]
    fn client_information_headers_stay_only_in_their_own_spelling() {
        for name in [
            "X-Forwarded-For",
            "X-Forwarded-Host",
            "X-Forwarded-Proto",
            "X-Request-Id",
            "Cf-Connecting-Ip",
            "Cf-Ray",
            "Cf-Ipcountry",
        ] {
            assert!(!deleted(name), "{name}");
            let underscored = name.replace('-', "_");
            assert!(deleted(&underscored) && deleted(&name.replace('-', ".")), "{name}");
            let last = name.rfind('-').expect("a separator");
            let mixed = format!("{}_{}", &name[..last], &name[last + 1..]);
            assert!(deleted(&mixed), "{mixed}");
        }
    }

    #[test]
    fn application_headers_stay() {
        for name in [
            "X-Requested-With",
            "X_Requested_With",
            "My_Header",
            "api_key",
            "X-Sb",
            "Cfg-Version",
            "Authorization",
            "Cookie",
        ] {
            assert!(!deleted(name), "{name}");
        }
    }
}
