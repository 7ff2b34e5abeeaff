//! Why a sandbox is where it is.

use proto::{name::Team, reason, sandbox::v1::CreateSandboxRequest};

use super::{Error, Sandboxes};
use crate::{node::registry::Tried, placement::Decision};

/// A decision as it is kept with the sandbox.
pub(super) fn encode(decision: &Decision) -> String {
    serde_json::to_string(decision).expect("a decision is plain data")
}

impl Sandboxes {
    /// The decision that brought a sandbox where it is, as it was made then.
    ///
    /// # Errors
    /// When there is no such sandbox, or no decision was recorded (its record was rebuilt from its
    /// node after the controller had lost its store).
    pub async fn explain(&self, team: &Team, id: &str) -> Result<Decision, Error> {
        let entry = self.find(team, id)?;
        let row = self.store.get(&entry.id).await?;
        let decision = row.filter(|row| !row.decision.is_empty()).ok_or_else(|| {
            let message = format!("no decision is recorded for {}", entry.id);
            Error::new(reason::SANDBOX_NOT_FOUND, message)
        })?;
        serde_json::from_str(&decision.decision).map_err(|error| {
            tracing::error!(sandbox_id = %entry.id, %error, "a recorded decision is damaged");
            Error::new(reason::STORE_FAILED, "the recorded decision is damaged")
        })
    }

    /// Where a creation would go now. Nothing is created or reserved.
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
        Ok(self.nodes.place(None, team, &spec, 1, &Tried::default()))
    }
}
