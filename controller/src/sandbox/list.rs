//! Reads sandboxes.

use proto::{
    id::{Invalid, SandboxId},
    name::Team,
    sandbox::v1::Sandbox,
};

use super::{Error, Sandboxes};

const PAGE_DEFAULT: u32 = 200;
const PAGE_MAX: u32 = 1000;

/// A page of sandboxes.
#[derive(Debug)]
pub struct Page {
    /// Ordered by id.
    pub sandboxes: Vec<Sandbox>,
    /// Token of the next page; empty on the last.
    pub next: String,
}

impl Sandboxes {
    /// Returns one sandbox.
    ///
    /// # Errors
    /// When there is none of this name in the team.
    pub fn get(&self, team: &Team, id: &str) -> Result<Sandbox, Error> {
        self.find(team, id).map(|entry| self.nodes.cache.view(&entry))
    }

    /// Returns a page of the team's sandboxes.
    ///
    /// # Errors
    /// When the size is out of range or the token is not one of ours.
    pub fn list(
        &self,
        team: &Team,
        size: u32,
        token: &str,
        include_ended: bool,
    ) -> Result<Page, Error> {
        if size > PAGE_MAX {
            return Err(Invalid::new("page_size", "must be 1 to 1000, or 0 for 200").into());
        }
        let size = if size == 0 { PAGE_DEFAULT } else { size };
        let after: Option<SandboxId> = if token.is_empty() {
            None
        } else {
            let bad = |_| Invalid::new("page_token", "must be the token of the page before");
            Some(token.parse().map_err(bad)?)
        };
        let (sandboxes, more) = self.nodes.cache.page(team, after, size as usize, include_ended);
        let last = sandboxes.last().filter(|_| more);
        Ok(Page { next: last.map(|s| s.id.clone()).unwrap_or_default(), sandboxes })
    }
}
