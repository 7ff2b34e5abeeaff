//! Decides what a sandbox reaches outside of itself: at most what its team may.

use proto::{Reason, name::Team, sandbox::v1 as wire, spec::Egress};

use crate::{
    node::Node,
    sandbox::{Error, RETRY, Result, Sandboxes},
};

impl Sandboxes {
    /// Returns what a sandbox of this team reaches that asks for this.
    ///
    /// # Errors
    /// EGRESS_REFUSED when it asks for more than its team may.
    pub(in crate::sandbox) fn egress(&self, team: &Team, asked: Option<Egress>) -> Result<Egress> {
        decide(team, asked, &self.options.egress, &self.team_egress(team))
    }

    /// Returns what a sandbox of this team reaches that asks for nothing.
    pub(in crate::sandbox) fn default_egress(&self, team: &Team) -> Egress {
        self.options.egress.both(&self.team_egress(team))
    }

    fn team_egress(&self, team: &Team) -> Egress {
        let state = self.quotas.state.lock();
        state.limits(team, &self.quotas.defaults).egress.unwrap_or_default()
    }
}

/// Explains in words why a node gets no sandbox with this egress.
pub(in crate::sandbox) const fn why_not_kept(egress: wire::Egress) -> &'static str {
    match egress {
        wire::Egress::Unspecified | wire::Egress::Open | wire::Egress::None => {
            "cannot close a sandbox: it does not isolate, or its agent is too old"
        }
        wire::Egress::Allow => {
            "cannot keep a sandbox to an allow-list: it does not isolate, it is not the gateway of its \
             sandboxes, or its agent is too old"
        }
    }
}

/// Checks that a node can keep a sandbox with this egress from what it must not reach.
///
/// # Errors
/// ISOLATION_FAILED when it cannot, NODE_UNREACHABLE while that is not known.
pub(in crate::sandbox) fn can_keep_to(node: &Node, egress: wire::Egress) -> Result<()> {
    let name = &node.name;
    match node.keeps_to(egress) {
        Some(true) => Ok(()),
        Some(false) => {
            let why = why_not_kept(egress);
            Err(Error::new(Reason::IsolationFailed, format!("{name} {why}")))
        }
        None => {
            let why = "is not connected: whether it can bound what a sandbox reaches is not known";
            Err(Error::new(Reason::NodeUnreachable, format!("{name} {why}")).retry(RETRY))
        }
    }
}

fn decide(team: &Team, asked: Option<Egress>, default: &Egress, max: &Egress) -> Result<Egress> {
    let Some(asked) = asked else { return Ok(default.both(max)) };
    if max.covers(&asked) {
        return Ok(asked);
    }
    let message = format!(
        "sandboxes of team {team} may have the egress `{max}` at most, and this one asks for `{asked}`: \
         ask for less, or an operator for more"
    );
    Err(Error::new(Reason::EgressRefused, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caller_only_tightens() {
        let team: Team = "acme".parse().expect("valid");
        let egress = |text: &str| text.parse::<Egress>().expect(text);
        let decided = |asked: &str, default: &str, max: &str| {
            let asked = (!asked.is_empty()).then(|| egress(asked));
            let decided = decide(&team, asked, &egress(default), &egress(max));
            decided.map_or_else(|_| "refused".to_owned(), |egress| egress.to_string())
        };
        assert_eq!(decided("", "open", "open"), "open");
        assert_eq!(decided("", "open", "none"), "none", "the maximum bounds the default");
        assert_eq!(decided("", "none", "open"), "none");
        assert_eq!(decided("none", "open", "open"), "none");
        assert_eq!(decided("open", "none", "open"), "open", "up to the maximum");
        assert_eq!(decided("open", "open", "none"), "refused");
        assert_eq!(decided("none", "open", "none"), "none");
        let error = decide(&team, Some(Egress::Open), &Egress::Open, &Egress::None);
        assert_eq!(error.expect_err("too much").reason, Reason::EgressRefused);

        let max = "allow=*.npmjs.org,github.com";
        assert_eq!(decided("allow=github.com", "open", "open"), "allow=github.com");
        assert_eq!(decided("", "open", max), max);
        assert_eq!(decided("", "allow=a.b,github.com", max), "allow=github.com");
        assert_eq!(decided("", "allow=a.b", max), "none", "nothing of the default is allowed");
        assert_eq!(decided("allow=x.npmjs.org", "open", max), "allow=x.npmjs.org");
        for asked in ["open", "allow=npmjs.org", "allow=*.github.com", "allow=github.com,a.b"] {
            assert_eq!(decided(asked, "open", max), "refused", "{asked}");
        }
        assert_eq!(decided("none", "open", max), "none");
        assert_eq!(decided("allow=github.com", "open", "none"), "refused");
    }
}
