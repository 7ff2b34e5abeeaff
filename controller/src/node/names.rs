//! The call that tells a node which sandboxes have which names.

use proto::agent::v1 as wire;

use super::{
    Client, Result,
    answer::{QUICK, call},
    calls::Call,
    renew::is_unknown,
};

impl Client {
    /// Changes the node's directory of names; returns the digest of all names that it has then. `None` from an
    /// older agent, which has no such call.
    pub async fn set_names(&self, request: wire::SetNamesRequest) -> Result<Option<u64>> {
        let mut client = self.names();
        let answer = async {
            match client.set_names(request).await {
                Ok(answer) => Ok(answer.map(|answer| Some(answer.digest))),
                Err(status) if is_unknown(&status) => Ok(tonic::Response::new(None)),
                Err(status) => Err(status),
            }
        };
        call(Call::SetNames, QUICK, answer).await
    }
}
