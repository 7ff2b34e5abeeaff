//! Credentials of the tunnel: what a connector proves itself with. Each node has the same.

use std::{fs, io, os::unix::fs::PermissionsExt as _, path::Path};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use daemon::{
    replace::{Access, replace},
    text,
};
use proto::secret::Secret;
use serde::{Deserialize, Serialize};

use super::ids::{CloudId, TunnelId};

/// Bytes of a secret that we make; Cloudflare takes 32 and more.
const SECRET: usize = 32;

/// Credentials in the form of cloudflared's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Account.
    #[serde(rename = "AccountTag")]
    pub account: CloudId,
    /// Secret, base64.
    #[serde(rename = "TunnelSecret")]
    pub secret: Secret<String>,
    /// Tunnel.
    #[serde(rename = "TunnelID")]
    pub tunnel: TunnelId,
}

/// Content of the token that Cloudflare's API gives for a tunnel.
#[derive(Deserialize)]
struct Token {
    a: CloudId,
    s: Secret<String>,
    t: TunnelId,
}

impl Credentials {
    /// Reads the token of a tunnel: base64 of JSON.
    ///
    /// # Errors
    /// When it is no such token. The error shows nothing of it.
    pub fn from_token(token: &Secret<String>) -> io::Result<Self> {
        let invalid = || io::Error::other("Cloudflare's token of the tunnel has an unknown form");
        let json = Secret::new(STANDARD.decode(token.trim()).map_err(|_| invalid())?);
        let Token { a, s, t } = serde_json::from_slice(&json).map_err(|_| invalid())?;
        Ok(Self { account: a, secret: s, tunnel: t })
    }

    /// Reads the file; `None` when it is missing or is no such file.
    pub fn read(path: &Path) -> Option<Self> {
        let text = Secret::new(text::read_if_there(path).ok().flatten()?);
        serde_json::from_str(&text).ok()
    }

    /// Writes the file for root alone.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let text = Secret::new(serde_json::to_string(self).map_err(io::Error::other)?);
        replace(path, text.as_bytes(), Access::PRIVATE)
    }
}

/// Returns true when others than root can read a file, or write to it.
///
/// # Errors
/// When it is not there.
pub fn is_open(path: &Path) -> io::Result<bool> {
    Ok(fs::metadata(path)?.permissions().mode() & 0o077 != 0)
}

/// Makes the secret of a new tunnel, base64.
///
/// # Errors
/// When there are no random numbers.
pub fn fresh_secret() -> io::Result<Secret<String>> {
    let mut random = [0u8; SECRET];
    getrandom::fill(&mut random).map_err(io::Error::other)?;
    Ok(STANDARD.encode(random).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACCOUNT: &str = "699d98642c564d2e855e9661899b7252";
    const TUNNEL: &str = "f70ff985-a4ef-4643-bbbc-4a0ed4fc8415";

    #[test]
    fn token_becomes_a_private_file_and_is_never_shown() {
        let secret = fresh_secret().expect("random").reveal();
        let token = format!("{{\"a\":\"{ACCOUNT}\",\"t\":\"{TUNNEL}\",\"s\":\"{secret}\"}}");
        let token = Secret::new(STANDARD.encode(token));
        let credentials = Credentials::from_token(&token).expect("a token");
        assert!(!format!("{credentials:?}").contains(&secret));
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("credentials.json");
        assert_eq!(Credentials::read(&path), None);
        credentials.write(&path).expect("written");
        let mode = std::fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        let json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("JSON");
        let expected = serde_json::json!({
            "AccountTag": ACCOUNT, "TunnelSecret": secret, "TunnelID": TUNNEL,
        });
        assert_eq!(json, expected);
        assert_eq!(Credentials::read(&path), Some(credentials));
        for bad in ["", "?", "e30="] {
            let error = Credentials::from_token(&bad.into()).expect_err("no token").to_string();
            assert!(error.contains("unknown form"), "{error}");
        }
    }

    #[test]
    fn secrets_are_random_and_long_enough() {
        let [one, two] = [(), ()].map(|()| fresh_secret().expect("random").reveal());
        assert_ne!(one, two);
        assert_eq!(STANDARD.decode(&one).expect("base64").len(), SECRET);
    }
}
