//! Explains why a sandbox is on its node.

use std::borrow::Cow;

use proto::{
    Reason,
    name::{NodeName, Team},
    sandbox::v1::CreateSandboxRequest,
};
use serde::{Deserialize, Serialize};

use crate::{
    node::registry::AttemptHistory,
    placement::{Decision, Filtered, PARTS, Part, Verdict},
    sandbox::{Error, Sandboxes},
};

/// Stored form of a decision. The full one was most of the store and of what a creation writes.
#[derive(Debug, Serialize, Deserialize)]
struct StoredDecision<'a> {
    attempt: u32,
    decided_ms: u64,
    holders: u32,
    nodes: Vec<StoredVerdict<'a>>,
}

/// Node, reason for its exclusion, detail, and the parts of the score: in the order of `PARTS`, to
/// four places, without trailing zeros.
#[derive(Debug, Serialize, Deserialize)]
struct StoredVerdict<'a>(NodeName, Option<Filtered>, Cow<'a, str>, Vec<f64>);

fn stored_verdict(verdict: &Verdict) -> StoredVerdict<'_> {
    let rounded = |part: &Part| (part.value * 10_000.0).round() / 10_000.0;
    let mut parts: Vec<f64> = verdict.parts.iter().map(rounded).collect();
    let last = parts.iter().rposition(|value| *value != 0.0);
    parts.truncate(last.map_or(0, |last| last + 1));
    StoredVerdict(verdict.node.clone(), verdict.filtered, verdict.detail.as_str().into(), parts)
}

/// Encodes a decision for the store.
pub(in crate::sandbox) fn encode(decision: &Decision) -> String {
    let stored = StoredDecision {
        attempt: decision.attempt,
        decided_ms: decision.decided_ms,
        holders: decision.holders,
        nodes: decision.verdicts.iter().map(stored_verdict).collect(),
    };
    serde_json::to_string(&stored).expect("a decision is plain data")
}

/// Decodes a stored decision, also of the form that earlier versions wrote.
fn decode(text: &str) -> Result<Decision, serde_json::Error> {
    let Ok(stored) = serde_json::from_str::<StoredDecision<'_>>(text) else {
        return serde_json::from_str(text);
    };
    let verdict = |StoredVerdict(node, filtered, detail, values): StoredVerdict<'_>| {
        let part = |(at, name): (usize, &&'static str)| Part {
            name: (*name).into(),
            value: values.get(at).copied().unwrap_or_default(),
        };
        // An excluded node has no score.
        let names = if filtered.is_none() { &PARTS[..] } else { &[] };
        Verdict {
            node,
            filtered,
            detail: detail.into_owned(),
            score: values.iter().sum(),
            parts: names.iter().enumerate().map(part).collect(),
        }
    };
    Ok(Decision {
        attempt: stored.attempt,
        decided_ms: stored.decided_ms,
        holders: stored.holders,
        verdicts: stored.nodes.into_iter().map(verdict).collect(),
    })
}

impl Sandboxes {
    /// Returns the recorded decision that put a sandbox on its node.
    ///
    /// # Errors
    /// When there is no such sandbox, or no decision was recorded (its record was rebuilt from its
    /// node after the controller had lost its store).
    pub async fn explain(&self, team: &Team, id: &str) -> Result<Decision, Error> {
        let entry = self.find(team, id)?;
        let row = self.store.get(&entry.id).await?;
        let decision = row.filter(|row| !row.decision.is_empty()).ok_or_else(|| {
            let message = format!("no decision is recorded for {}", entry.id);
            Error::new(Reason::SandboxNotFound, message)
        })?;
        decode(&decision.decision).map_err(|error| {
            tracing::error!(sandbox_id = %entry.id, %error, "a recorded decision is damaged");
            Error::new(Reason::StoreFailed, "the recorded decision is damaged")
        })
    }

    /// Returns where a creation would go now. Nothing is created or reserved.
    ///
    /// # Errors
    /// When the request is wrong.
    pub fn dry_run(
        &self,
        team: &Team,
        mut request: CreateSandboxRequest,
    ) -> Result<Decision, Error> {
        if request.request_id.is_empty() {
            request.request_id = "dry-run".into();
        }
        let spec = self.sized(&mut request)?;
        Ok(self.nodes.place(None, team, &spec, 1, &AttemptHistory::default(), None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decodes_stored_decisions_of_both_forms() {
        let part = |(at, name): (u32, &&'static str)| Part {
            name: (*name).into(),
            value: if at < 2 { 0.25 } else { 0.0 },
        };
        let fits = Verdict {
            node: "n1".parse().expect("node"),
            filtered: None,
            detail: "cpu \"0.25\"".into(),
            score: 0.5,
            parts: (0..).zip(&PARTS).map(part).collect(),
        };
        let out = Verdict {
            filtered: Some(Filtered::Cordoned),
            score: 0.0,
            parts: Vec::new(),
            ..fits.clone()
        };
        let decision =
            Decision { attempt: 1, decided_ms: 2, holders: 3, verdicts: vec![fits, out] };
        let whole = serde_json::to_string(&decision).expect("plain data");
        let stored = encode(&decision);
        assert!(stored.len() < whole.len() / 2, "{stored}");
        assert_eq!(decode(&stored).expect("kept"), decision);
        assert_eq!(decode(&whole).expect("whole"), decision);
    }
}
