//! URLs of open ports: of the ingress, where it has a domain; else the container's own name or address.

use std::{fmt, net::Ipv4Addr, str::FromStr};

use proto::{
    host::{FORMS, FullName, main_port},
    name::{Port, SnapshotId},
    sandbox::v1::Sandbox,
};

/// Form of the first label by the name of a sandbox that leads to its main port.
const MAIN_FORM: &str = "{name}--{team}";
/// Beginning of the forms that say what the number in front is.
const PREFIX: &str = "port-";

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
        let is_by_name = rest.contains("{name}") && rest.contains("{team}");
        let is_by_id =
            rest.contains("{port}") && (rest.contains("{vmid}") || rest.contains("{id}"));
        if !is_by_name && !is_by_id {
            return Err("must hold {port}, and {vmid} or {id}, or hold {name} and {team}".into());
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || "-.:".contains(c);
        let fields = ["{port}", "{vmid}", "{id}", "{name}", "{team}"];
        let filled = fields.iter().fold(rest.to_owned(), |text, field| text.replace(field, "1"));
        if !filled.chars().all(plain) {
            return Err("must be a host name, and a port where it is not the usual one".into());
        }
        let (label, domain) = rest.split_at(rest.find(['.', ':']).unwrap_or(rest.len()));
        let is_answered = FORMS.iter().any(|known| known.eq_ignore_ascii_case(label));
        if !is_answered || domain.contains('{') {
            let forms = FORMS.join(", ");
            return Err(format!(
                "must be one of {forms}, and then the domain: nodes answer no other"
            ));
        }
        Ok(Self(text.to_owned()))
    }

    /// True for the example of the package, which leads nowhere.
    pub fn is_example(&self) -> bool {
        let host = self.host();
        host == "example.com" || host.ends_with(".example.com")
    }

    /// Returns whether the URLs are https.
    pub fn is_https(&self) -> bool {
        self.0.starts_with("https:")
    }

    /// Returns the domain below which the host names are; `None` for the example of the package, and when
    /// the first label is the whole name.
    pub fn domain(&self) -> Option<String> {
        let (_, domain) = self.host().split_once('.')?;
        (!domain.is_empty() && !self.is_example()).then(|| domain.to_owned())
    }

    fn host(&self) -> &str {
        let rest = self.0.split_once("://").map_or("", |(_, rest)| rest);
        rest.split(':').next().unwrap_or_default()
    }

    /// Returns whether URLs have the names of sandboxes.
    pub fn is_by_name(&self) -> bool {
        self.0.contains("{name}")
    }

    /// Returns the URL of a port. One by name falls back to the id where the sandbox has no name, or where its name and
    /// its team make no host name; and it has the port unless that is the main one.
    pub fn url(&self, port: u32, sandbox: &Sandbox) -> String {
        let form = if self.is_by_name() {
            &self.by_name(port, sandbox).unwrap_or_else(|| self.with_label("port-{port}-{id}"))
        } else {
            &self.0
        };
        form.replace("{port}", &port.to_string())
            .replace("{vmid}", &sandbox.vmid.to_string())
            .replace("{id}", &sandbox.id)
    }

    fn by_name(&self, port: u32, sandbox: &Sandbox) -> Option<String> {
        let (team, name) = (sandbox.team.parse().ok()?, sandbox.name.parse().ok()?);
        let full = FullName::new(&team, &name)?;
        let services = sandbox.services.iter().map(|open| (open.name.as_str(), open.port));
        let is_main =
            self.label().eq_ignore_ascii_case(MAIN_FORM) && main_port(services) == Some(port);
        let prefix = if self.label().starts_with(PREFIX) { PREFIX } else { "" };
        let with_port = || full.label_of(Port::try_from(port).ok()?, prefix);
        let label = full.label().filter(|_| is_main).or_else(with_port)?;
        Some(self.with_label(&label))
    }

    /// Returns the first label of the host name.
    fn label(&self) -> &str {
        self.host().split('.').next().unwrap_or_default()
    }

    fn with_label(&self, label: &str) -> String {
        self.0.replacen(self.label(), label, 1)
    }
}

/// DNS suffix below which the containers' host names are known, such as `lan`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suffix(String);

impl FromStr for Suffix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let label = |label: &str| {
            let plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
            (1..=63).contains(&label.len())
                && label.bytes().all(plain)
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        // The host name of a container and its dot come in front.
        if text.len() <= 253 - 64 && text.split('.').all(label) {
            return Ok(Self(text.to_owned()));
        }
        Err("must be a DNS suffix in lower case, without a dot in front, such as `lan`".to_owned())
    }
}

/// First numbers of the addresses that may be given, such as `10.100.`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressPrefix(Vec<u8>);

impl AddressPrefix {
    /// Returns true when the address begins with these numbers.
    fn holds(&self, address: Ipv4Addr) -> bool {
        address.octets().starts_with(&self.0)
    }
}

impl fmt::Display for AddressPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers: Vec<_> = self.0.iter().map(u8::to_string).collect();
        write!(f, "{}{}", numbers.join("."), if numbers.len() < 4 { "." } else { "" })
    }
}

impl FromStr for AddressPrefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.strip_suffix('.').unwrap_or(text).split('.');
        let number = |text: &str| {
            let plain = text.bytes().all(|byte| byte.is_ascii_digit());
            let number = text.parse::<u8>().ok().filter(|_| plain)?;
            (text == "0" || !text.starts_with('0')).then_some(number)
        };
        let numbers: Option<Vec<u8>> = numbers.map(number).collect();
        numbers.filter(|numbers| (1..=4).contains(&numbers.len())).map(Self).ok_or_else(|| {
            "must be the first numbers of an IPv4 address, such as `10.100.`".to_owned()
        })
    }
}

/// URL of a port.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Url {
    /// The URL; empty while there is none.
    pub text: String,
    /// Why there is none, for people.
    pub missing: String,
    /// True when it leads to the container itself, past the ingress and its rules.
    pub bypasses_access: bool,
}

/// Rules by which URLs are made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Urls {
    /// URLs of the ingress; `None` while it has no domain.
    pub template: Option<UrlTemplate>,
    /// Suffix of the containers' names; `None` where no DNS knows them.
    pub suffix: Option<Suffix>,
    /// Addresses that may be given; `None`: all.
    pub prefix: Option<AddressPrefix>,
}

impl From<UrlTemplate> for Urls {
    fn from(template: UrlTemplate) -> Self {
        Self { template: Some(template), ..Self::default() }
    }
}

impl Urls {
    /// Returns the domain of the ingress.
    pub fn domain(&self) -> Option<String> {
        self.template()?.domain()
    }

    /// Returns whether the URLs of the ingress are https.
    pub fn is_https(&self) -> bool {
        self.template.as_ref().is_none_or(UrlTemplate::is_https)
    }

    /// True while URLs are those of the containers themselves.
    pub fn without_ingress(&self) -> bool {
        self.template().is_none()
    }

    fn template(&self) -> Option<&UrlTemplate> {
        self.template.as_ref().filter(|template| !template.is_example())
    }

    /// Returns the URL of a port: of the ingress, else by the container's name, else by its address.
    pub fn of(&self, sandbox: &Sandbox, port: u32) -> Url {
        if let Some(template) = self.template() {
            let text = template.url(port, sandbox);
            return Url { text, ..Url::default() };
        }
        let host = match self.name(sandbox) {
            Some(name) => Ok(name),
            None => self.address(sandbox),
        };
        match host {
            Ok(host) => Url {
                text: format!("http://{host}:{port}"),
                bypasses_access: true,
                ..Url::default()
            },
            Err(missing) => Url { missing, ..Url::default() },
        }
    }

    /// Name of the container in the operator's DNS. The host name of one that was adopted is not known.
    fn name(&self, sandbox: &Sandbox) -> Option<String> {
        let Suffix(suffix) = self.suffix.as_ref()?;
        let ours = !sandbox.id.is_empty() && sandbox.snapshot_id != SnapshotId::ADOPTED;
        ours.then(|| format!("{}.{suffix}", sandbox.id))
    }

    /// Returns the first address of the container that begins as it should, or why there is none.
    fn address(&self, sandbox: &Sandbox) -> Result<String, String> {
        // An agent of an earlier version tells one.
        let one = std::slice::from_ref(&sandbox.ip);
        let told = if sandbox.addresses.is_empty() { one } else { &sandbox.addresses };
        let all: Vec<Ipv4Addr> = told.iter().filter_map(|one| one.parse().ok()).collect();
        if all.is_empty() {
            return Err("the sandbox has no address that is known".to_owned());
        }
        let Some(prefix) = &self.prefix else { return Ok(all[0].to_string()) };
        let fits = all.iter().find(|address| prefix.holds(**address));
        fits.map(Ipv4Addr::to_string).ok_or_else(|| {
            let all: Vec<_> = all.iter().map(Ipv4Addr::to_string).collect();
            let all = all.join(", ");
            format!(
                "no address of the sandbox begins with {prefix} (container_ip_prefix): it has {all}"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn url_template_is_filled_or_refused() {
        let template =
            UrlTemplate::new("http://port-{port}-vm-{vmid}.sandbox.localhost:8480").expect("good");
        let url = template.url(8000, &Sandbox { vmid: 100_001, ..Sandbox::default() });
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

    #[test]
    fn url_template_has_a_form_that_nodes_answer() {
        for label in FORMS {
            for template in [format!("https://{label}.x.test"), format!("http://{label}.x:8480")] {
                assert!(UrlTemplate::new(&template).is_ok(), "{template}");
            }
        }
        for bad in [
            "https://{id}-{port}.x",
            "https://{port}.{id}.x",
            "https://{port}-{vmid}.x",
            "https://p-{port}-{id}.x",
            "https://port-{port}-{id}-app.x",
            "https://port-{port}-{id}.{id}.x",
            "https://x.port-{port}-{id}.x",
            "https://{name}.x",
            "https://{name}-{team}.x",
            "https://{team}--{name}.x",
            "https://{port}-{name}.{team}.x",
            "https://{name}--{team}.{team}.x",
        ] {
            let why = UrlTemplate::new(bad).expect_err(bad);
            let says = why.contains("port-{port}-vm-{vmid}, port-{port}-{id}, ");
            assert!(says || why.contains("{name} and {team}"), "{bad}: {why}");
        }
    }

    fn sandbox() -> Sandbox {
        Sandbox {
            id: "pvelxc-01".into(),
            vmid: 100_001,
            ip: "10.100.1.7".into(),
            snapshot_id: "small".into(),
            ..Sandbox::default()
        }
    }

    fn urls(template: &str, suffix: &str, prefix: &str) -> Urls {
        let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Urls {
            template: given(template).map(|text| UrlTemplate::new(&text).expect("a template")),
            suffix: given(suffix).map(|text| text.parse().expect("a suffix")),
            prefix: given(prefix).map(|text| text.parse().expect("a prefix")),
        }
    }

    const INGRESS: &str = "https://port-{port}-vm-{vmid}.sbx.test";
    const EXAMPLE: &str = "https://port-{port}-vm-{vmid}.sandbox.example.com";

    #[test]
    fn url_is_that_of_the_ingress_then_the_name_then_the_address() {
        let (ingress, name, address) = (
            "https://port-80-vm-100001.sbx.test",
            "http://pvelxc-01.lan:80",
            "http://10.100.1.7:80",
        );
        for (template, suffix, prefix, expected, past) in [
            (INGRESS, "", "", ingress, false),
            (INGRESS, "lan", "10.", ingress, false),
            ("", "lan", "", name, true),
            (EXAMPLE, "lan", "", name, true),
            ("", "lan", "192.168.", name, true),
            ("", "", "", address, true),
            (EXAMPLE, "", "", address, true),
            ("", "", "10.100.", address, true),
            ("", "", "10.100.1.7", address, true),
            ("", "", "10.1", "", false),
            ("", "", "192.168.", "", false),
        ] {
            let url = urls(template, suffix, prefix).of(&sandbox(), 80);
            let what = format!("{template:?} {suffix:?} {prefix:?}");
            assert_eq!((url.text.as_str(), url.bypasses_access), (expected, past), "{what}");
            assert_eq!(url.missing.is_empty(), !expected.is_empty(), "{what}");
        }
    }

    #[test]
    fn url_by_name_falls_back_to_the_id() {
        let named = |name: &str, team: &str, services: &[(&str, u32)]| {
            let open = |(name, port): &(&str, u32)| proto::sandbox::v1::HttpService {
                name: (*name).into(),
                port: *port,
                ..Default::default()
            };
            let services = services.iter().map(open).collect();
            Sandbox { name: name.into(), team: team.into(), services, ..sandbox() }
        };
        let (main, plain, prefixed) =
            ("{name}--{team}", "{port}-{name}--{team}", "port-{port}-{name}--{team}");
        let (one, two) = (&[("web", 80)][..], &[("web", 80), ("main", 81)][..]);
        let long = "a".repeat(30);
        let longer = "b".repeat(25);
        for (form, name, team, services, expected) in [
            (main, "box", "red", one, "box--red"),
            (main, "box", "red", two, "80-box--red"),
            (plain, "box", "red", one, "80-box--red"),
            (prefixed, "box", "red", one, "port-80-box--red"),
            (main, "xn", "red", one, "80-xn--red"),
            (main, "", "red", one, "port-80-pvelxc-01"),
            (main, "box", "Red", one, "port-80-pvelxc-01"),
            (plain, "box", "a.b", one, "port-80-pvelxc-01"),
            (main, &long, &longer, one, &format!("{long}--{longer}")),
            (prefixed, &long, &longer, one, "port-80-pvelxc-01"),
        ] {
            let template = UrlTemplate::new(&format!("https://{form}.sbx.test:8480"));
            let url = template.expect("a template").url(80, &named(name, team, services));
            assert_eq!(url, format!("https://{expected}.sbx.test:8480"), "{form} {name} {team}");
        }
        let two = named("box", "red", two);
        let template = UrlTemplate::new("https://{name}--{team}.sbx.test").expect("a template");
        assert_eq!(template.url(81, &two), "https://box--red.sbx.test");
        assert_eq!(template.domain().as_deref(), Some("sbx.test"));
    }

    #[test]
    fn address_is_chosen_by_its_first_numbers() {
        let addresses = ["192.168.1.9", "10.1.0.4", "10.100.1.7"].map(str::to_owned);
        let several =
            Sandbox { ip: addresses[0].clone(), addresses: addresses.into(), ..sandbox() };
        for (prefix, expected) in [
            ("", "192.168.1.9"),
            ("10.", "10.1.0.4"),
            ("10.1", "10.1.0.4"),
            ("10.100.", "10.100.1.7"),
            ("10.100.1.7", "10.100.1.7"),
        ] {
            let url = urls("", "", prefix).of(&several, 80).text;
            assert_eq!(url, format!("http://{expected}:80"), "{prefix:?}");
        }
        let none = urls("", "", "172.16").of(&several, 80);
        let all = "172.16. (container_ip_prefix): it has 192.168.1.9, 10.1.0.4, 10.100.1.7";
        assert!(none.text.is_empty() && none.missing.ends_with(all), "{none:?}");
        // It has one on another interface alone.
        let second = Sandbox { ip: String::new(), addresses: vec!["10.1.0.4".into()], ..sandbox() };
        assert_eq!(urls("", "", "").of(&second, 80).text, "http://10.1.0.4:80");
    }

    #[test]
    fn prefix_of_addresses_is_that_of_the_file_then_of_the_environment() {
        let dir = tempfile::tempdir().expect("a directory");
        let load = |line: &str, variable: Option<&str>| {
            let file = dir.path().join("controller.toml");
            std::fs::write(&file, format!("url_template = \"\"\n{line}\n")).expect("written");
            let env = |name: &str| {
                assert_eq!(name, "PVE_CONTAINER_IP_PREFIX");
                variable.map(str::to_owned)
            };
            Config::load_in(&file, &env).map(|config| config.urls())
        };
        let several =
            Sandbox { addresses: vec!["10.1.0.4".into(), "10.9.0.7".into()], ..sandbox() };
        let file = "container_ip_prefix = \"10.1.\"";
        for (line, variable, expected) in [
            ("", None, "10.1.0.4"),
            ("", Some(""), "10.1.0.4"),
            ("", Some("10.9"), "10.9.0.7"),
            (file, Some("10.9."), "10.1.0.4"),
        ] {
            let url = load(line, variable).expect("valid").of(&several, 80).text;
            assert_eq!(url, format!("http://{expected}:80"), "{line:?} {variable:?}");
        }
        let wrong = load("", Some("10.0.0.0/8")).expect_err("no prefix").to_string();
        assert!(wrong.contains("container_ip_prefix"), "{wrong}");
    }

    #[test]
    fn sandbox_without_a_known_name_or_address_has_the_next_or_none() {
        let adopted = Sandbox { snapshot_id: SnapshotId::ADOPTED.into(), ..sandbox() };
        assert_eq!(urls("", "lan", "").of(&adopted, 80).text, "http://10.100.1.7:80");
        let placed = Sandbox { ip: String::new(), ..sandbox() };
        let odd = Sandbox { ip: "fe80::1".into(), ..sandbox() };
        for without in [placed, odd] {
            let url = urls("", "", "10.").of(&without, 80);
            assert!(url.text.is_empty() && url.missing.contains("no address"), "{url:?}");
        }
    }

    #[test]
    fn suffixes_and_prefixes_are_checked() {
        for good in ["lan", "home.arpa", "a-1.b"] {
            assert!(good.parse::<Suffix>().is_ok(), "{good}");
        }
        for bad in ["", ".lan", "lan.", "a..b", "LAN", "a b", "a/b", "-a", "{id}", "a:1"] {
            assert!(bad.parse::<Suffix>().is_err(), "{bad}");
        }
        for good in ["10", "10.", "10.100.", "10.0.1", "192.168.1.254"] {
            assert!(good.parse::<AddressPrefix>().is_ok(), "{good}");
        }
        for bad in ["", ".", "10..", "256", "10.0.0.1.2", "10.01", "a", "10.0/16", "::1", "-1"] {
            assert!(bad.parse::<AddressPrefix>().is_err(), "{bad}");
        }
    }
}
