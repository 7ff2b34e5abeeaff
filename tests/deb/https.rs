//! Https by Caddy itself under its real units: port 443 with the capability of the drop-in alone, and a certificate
//! that is replaced while requests go on.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

use super::{
    booted::{Booted, address},
    steps::{self, AGENT, INGRESS, INGRESS_GREEN},
    web::{self, ANSWER},
};

/// The domain that the controller tells its nodes.
const DOMAIN: &str = "sandbox.test";
const CONFIG: &str = "/etc/pve-sandbox/agent.toml";
const CERT: &str = "/etc/ssl/sandbox/fullchain.pem";
const KEY: &str = "/etc/ssl/sandbox/privkey.pem";
/// Number of the capability to listen on ports below 1024, as a set of it alone.
const BIND_SERVICE: u64 = 1 << 10;

/// CA of the test's own, whose certificate `curl` reads from a file.
struct Ca {
    issuer: CertifiedIssuer<'static, KeyPair>,
    file: PathBuf,
}

impl Ca {
    fn new(dir: &Path, name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // By their names `curl` tells one from the other.
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let key = KeyPair::generate().expect("a key");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("signed");
        let file = dir.join(name);
        fs::write(&file, issuer.pem()).expect("written");
        Self { issuer, file }
    }

    /// Puts a certificate for all sandboxes where the node's agent looks for it.
    fn issue(&self, node: &Booted) {
        let params = CertificateParams::new(vec![format!("*.{DOMAIN}")]).expect("a name");
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        let dir = node.path(CERT);
        fs::create_dir_all(dir.parent().expect("a folder")).expect("made");
        fs::write(node.path(CERT), certificate.pem()).expect("written");
        fs::write(node.path(KEY), key.serialize_pem()).expect("written");
        fs::set_permissions(node.path(KEY), fs::Permissions::from_mode(0o600)).expect("set");
    }
}

/// Gives the ingress of a node that has joined a certificate of its own, replaces it, and takes it away again.
pub(crate) fn own_certificate_is_served_and_replaced(node: &Booted, id: &str) {
    let host = web::serve(node, id);
    let work = tempfile::tempdir().expect("a folder");
    let (first, second) = (Ca::new(work.path(), "first"), Ca::new(work.path(), "second"));
    let both = work.path().join("both");
    fs::write(&both, first.issuer.pem() + &second.issuer.pem()).expect("written");
    let is_served = |ca: &Ca| get(node, &host, &ca.file, "--http2").0 == Some(0);
    let may_bind = || capabilities(node) == Some(BIND_SERVICE);

    let before = fs::read_to_string(node.path(CONFIG)).expect("read");
    let own =
        format!("\n[ingress.certificate]\ncert = \"{CERT}\"\nkey = \"{KEY}\"\nredirect = true\n");
    fs::write(node.path(CONFIG), format!("{before}{own}")).expect("written");
    first.issue(node);
    node.ok(&["systemctl", "restart", AGENT]);
    until(node, "the first certificate", || is_served(&first) && may_bind());
    for (protocol, version) in [("--http1.1", "1.1"), ("--http2", "2")] {
        let told = get(node, &host, &first.file, protocol);
        assert_eq!(told, (Some(0), format!("{ANSWER} 200 {version}")), "{protocol}");
    }
    let (code, told) = get(node, &host, &second.file, "--http2");
    assert!(code != Some(0), "it shows another certificate than that of the file: {told}");
    let (to, url) = (format!("{host}:80:{}", address(1)), format!("http://{host}/"));
    let redirect = ["--resolve", &to, "--write-out", "%{http_code} %{redirect_url}", &url];
    assert_eq!(web::curl(node, &redirect), (Some(0), format!("308 https://{host}/")));

    second.issue(node);
    // The agent looks at the files once a minute, and when it starts.
    node.ok(&["systemctl", "restart", AGENT]);
    until(node, "the second certificate", || {
        let told = get(node, &host, &both, "--http2");
        assert_eq!(told, (Some(0), format!("{ANSWER} 200 2")), "while it is replaced");
        is_served(&second) && !is_served(&first) && may_bind()
    });

    fs::write(node.path(CONFIG), before).expect("written");
    node.ok(&["systemctl", "restart", AGENT]);
    until(node, "a Caddy without capabilities", || capabilities(node) == Some(0));
    assert!(!is_served(&second), "nothing listens on 443 any more");
    assert_eq!(web::by_tunnel(node, &host), format!("{ANSWER} 200"));
}

/// Asks for a page by https with this file of CAs; returns curl's exit code, and body, status and version of HTTP.
fn get(node: &Booted, host: &str, ca: &Path, protocol: &str) -> (Option<i32>, String) {
    let (ca, to) = (ca.display().to_string(), format!("{host}:443:{}", address(1)));
    let url = format!("https://{host}/");
    let answer = " %{http_code} %{http_version}";
    let words = ["--cacert", &ca, "--resolve", &to, protocol, "--write-out", answer, &url];
    web::curl(node, &words)
}

/// Waits until `is_so` returns true. At the deadline the test fails with the log of the units.
#[track_caller]
fn until(node: &Booted, what: &str, is_so: impl FnMut() -> bool) {
    let log = || node.run(&["journalctl", "--no-pager", "-n", "40", "-u", "pve-sandbox-*"]).1;
    steps::until(what, log, is_so);
}

/// Returns the capabilities of the one Caddy that runs; `None` while one takes over from the other.
fn capabilities(node: &Booted) -> Option<u64> {
    let units = [INGRESS, INGRESS_GREEN];
    let active: Vec<_> =
        units.iter().filter(|unit| node.unit(unit, "ActiveState") == "active").collect();
    let [unit] = active.as_slice() else { return None };
    let (code, status) =
        node.run(&["cat", &format!("/proc/{}/status", node.unit(unit, "MainPID"))]);
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    (code == Some(0)).then(|| u64::from_str_radix(set.trim(), 16).expect("a set"))
}
