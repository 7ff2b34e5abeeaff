//! Decides what a sandbox reaches outside of itself: at most what its team may.

use proto::{Reason, name::Team, spec::Egress};

use crate::sandbox::{Error, Result, Sandboxes};

impl Sandboxes {
    /// Returns what a sandbox of this team reaches that asks for this.
    ///
    /// # Errors
    /// EGRESS_REFUSED when it asks for more than its team may.
    pub(in crate::sandbox) fn egress(&self, team: &Team, asked: Option<Egress>) -> Result<Egress> {
        decide(team, asked, self.options.egress, self.team_egress(team))
    }

    /// Returns what a sandbox of this team reaches that asks for nothing.
    pub(in crate::sandbox) fn default_egress(&self, team: &Team) -> Egress {
        self.options.egress.min(self.team_egress(team))
    }

    fn team_egress(&self, team: &Team) -> Egress {
        let state = self.quotas.state.lock();
        state.limits(team, self.quotas.defaults).egress.unwrap_or_default()
    }
}

fn decide(team: &Team, asked: Option<Egress>, default: Egress, max: Egress) -> Result<Egress> {
    match asked {
        None => Ok(default.min(max)),
        Some(asked) if asked <= max => Ok(asked),
        Some(asked) => {
            let message = format!(
                "sandboxes of team {team} may have the egress `{max}` at most, and this one asks for \
                 `{asked}`: ask for less, or an operator for more"
            );
            Err(Error::new(Reason::EgressRefused, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caller_only_tightens() {
        let team: Team = "acme".parse().expect("valid");
        let decided = |asked, default, max| decide(&team, asked, default, max).ok();
        let (none, open) = (Egress::None, Egress::Open);
        assert_eq!(decided(None, open, open), Some(open));
        assert_eq!(decided(None, open, none), Some(none), "the maximum bounds the default");
        assert_eq!(decided(None, none, open), Some(none));
        assert_eq!(decided(Some(none), open, open), Some(none));
        assert_eq!(decided(Some(open), none, open), Some(open), "up to the maximum");
        assert_eq!(decided(Some(open), open, none), None);
        assert_eq!(decided(Some(none), open, none), Some(none));
        let error = decide(&team, Some(open), open, none).expect_err("too much");
        assert_eq!(error.reason, Reason::EgressRefused);
    }
}
