//! URLs of open ports.

/// Checked template such as `https://port-{port}-vm-{vmid}.sandbox.example.com`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UrlTemplate(String);

impl UrlTemplate {
    /// Checks a template.
    ///
    /// # Errors
    /// A sentence that says what is wrong with the template.
    pub fn new(text: &str) -> Result<Self, String> {
        let rest = text
            .strip_prefix("https://")
            .or_else(|| text.strip_prefix("http://"))
            .ok_or("must start with http:// or https://")?;
        if !rest.contains("{port}") || !(rest.contains("{vmid}") || rest.contains("{id}")) {
            return Err("must hold {port}, and {vmid} or {id}".into());
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || "-.:".contains(c);
        let filled = rest.replace("{port}", "1").replace("{vmid}", "1").replace("{id}", "1");
        if !filled.chars().all(plain) {
            return Err("must be a host name, and a port where it is not the usual one".into());
        }
        Ok(Self(text.to_owned()))
    }

    /// Returns whether the URLs are https.
    pub fn is_https(&self) -> bool {
        self.0.starts_with("https:")
    }

    /// Returns the domain below which the host names are; `None` for the example of the package, and when
    /// the first label is the whole name.
    pub fn domain(&self) -> Option<String> {
        let rest = self.0.split_once("://").map(|(_, rest)| rest)?;
        let host = rest.split(':').next()?;
        let (_, domain) = host.split_once('.')?;
        (!domain.is_empty() && !domain.ends_with("example.com")).then(|| domain.to_owned())
    }

    /// Returns the URL of a port.
    pub fn url(&self, port: u32, vmid: u32, id: &str) -> String {
        self.0
            .replace("{port}", &port.to_string())
            .replace("{vmid}", &vmid.to_string())
            .replace("{id}", id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn url_template_is_filled_or_refused() {
        let template =
            UrlTemplate::new("http://port-{port}-vm-{vmid}.sandbox.localhost:8480").expect("good");
        let url = template.url(8000, 100_001, "pvelxc-x");
        assert_eq!(url, "http://port-8000-vm-100001.sandbox.localhost:8480");
        assert_eq!(
            (template.domain().as_deref(), template.is_https()),
            (Some("sandbox.localhost"), false)
        );
        let example = UrlTemplate::new("https://port-{port}-vm-{vmid}.sandbox.example.com");
        assert_eq!(example.expect("good").domain(), None);
        for bad in ["port-{port}-vm-{vmid}.x", "https://{port}.x", "https://{port}-{vmid}.x/path"] {
            assert!(UrlTemplate::new(bad).is_err(), "{bad}");
        }
    }
}
