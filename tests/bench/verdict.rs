//! Cost of the verdict on a request, in memory: of a public port, and of one that needs a session.

use std::{collections::BTreeMap, hint::black_box};

use agent::{
    ingress::{
        OpenPort, Owner, State, Target,
        decide::{Question, Rules, Verdict, Via, decide},
    },
    journal::AccessKey,
    sandbox::access::credential::{Credential, Purpose},
};
use anyhow::{Result, ensure};
use proto::{
    id::{SandboxId, Vmid},
    name::Port,
    visibility::Visibility,
};
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::http::{HeaderMap, HeaderName};

use crate::figures::{Figures, median};

/// Verdicts of one round, and rounds.
const ROUND: u32 = 20_000;
const ROUNDS: usize = 9;
/// Time of all questions, seconds.
const NOW_S: u64 = 1_000_000;

/// Measures a verdict, and adds its figures.
pub(crate) fn measure(figures: &mut Figures) -> Result<()> {
    let public = verdict_ns(Visibility::Public)?;
    let team = verdict_ns(Visibility::Team)?;
    figures.alone("verdict_ns", public, "ns");
    figures.add("verdict_ns_session", team, "ns", "public port", public);
    Ok(())
}

fn verdict_ns(visibility: Visibility) -> Result<f64> {
    let (id, key) = (SandboxId::new(1, &[1; 10]), AccessKey::new([7; 32]));
    let port: Port = "8000".parse()?;
    let open = OpenPort { visibility, generation: 1 };
    let target = Target {
        id,
        vmid: Vmid::try_from(100_001)?,
        team: "red".parse()?,
        name: None,
        state: State::Running,
        ip: Some([10, 100, 1, 5].into()),
        ports: BTreeMap::from([(port, open)]),
        main: None,
        key: Some(key),
    };
    let session = Credential {
        purpose: Purpose::Session,
        port,
        generation: 1,
        expires_s: NOW_S + 60,
        user: Some("ada".parse()?),
    };
    let mut headers = HeaderMap::new();
    let cookie = format!("a=1; __Host-sbx-8000={}; b=2", session.sign(&key, &id));
    for (name, value) in [
        ("host", "port-8000-vm-100001.sandbox.example.com"),
        ("x-forwarded-method", "GET"),
        ("x-forwarded-uri", "/assets/app.js?v=3"),
        ("sec-fetch-site", "same-origin"),
        ("cookie", &cookie),
    ] {
        headers.insert(HeaderName::from_static(name), value.parse()?);
    }
    let rules = Rules { domain: "sandbox.example.com".parse()?, parents: Vec::new(), cors: true };
    let mut rounds = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        for _ in 0..ROUND {
            let question = Question::new(Via::Edge, black_box(&headers), &rules, NOW_S);
            let verdict = black_box(decide(&question, Some(&target), &Owner::Nobody));
            ensure!(matches!(verdict, Verdict::Local { .. }), "{visibility}: {verdict:?}");
        }
        rounds.push(begun.elapsed().as_secs_f64() * 1e9 / f64::from(ROUND));
    }
    Ok(median(&mut rounds))
}
