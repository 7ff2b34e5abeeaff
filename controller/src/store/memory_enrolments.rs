//! Nodes that joined, in memory.

use proto::name::NodeName;

use super::{
    Result, Store as _,
    enrolments::{Admission, Enrolment, Enrolments, Issued, NodeToken},
    memory::Memory,
};

#[async_trait::async_trait]
impl Enrolments for Memory {
    async fn add_node_token(&self, token: NodeToken) -> Result<()> {
        let mut tables = self.enrolments.lock();
        let ended = |old: &NodeToken| old.expires_ms < token.created_ms;
        let void = |old: &NodeToken| old.used_ms == 0 && old.node == token.node;
        tables.tokens.retain(|_, old| !ended(old) && !void(old));
        tables.tokens.insert(token.id.clone(), token);
        Ok(())
    }

    async fn node_token(&self, id: &str) -> Result<Option<NodeToken>> {
        Ok(self.enrolments.lock().tokens.get(id).cloned())
    }

    async fn admit(&self, admission: Admission) -> Result<bool> {
        let Admission { token, key, node, address, pool, issued, now_ms } = admission;
        {
            let mut tables = self.enrolments.lock();
            let usable = |known: &&mut NodeToken| {
                let free = known.used_ms == 0 || known.key == key;
                free && known.node == node && known.expires_ms > now_ms
            };
            let Some(known) = tables.tokens.get_mut(&token).filter(usable) else {
                return Ok(false);
            };
            (known.used_ms, known.key) = (now_ms, key);
            let only_listed = tables.nodes.get(&node).is_some_and(|old| old.only_listed);
            let enrolment = Enrolment {
                node: node.clone(),
                address: address.clone(),
                pool,
                joined_ms: now_ms,
                revoked_ms: 0,
                only_listed,
                serials: Vec::new(),
            };
            tables.nodes.insert(node.clone(), enrolment);
            tables.add(&node, issued, now_ms);
        }
        self.put_node(&node, &address).await?;
        Ok(true)
    }

    async fn enrolments(&self) -> Result<Vec<Enrolment>> {
        let tables = self.enrolments.lock();
        let with_serials = |known: &Enrolment| {
            let of_node = tables.certificates.iter().filter(|(_, (node, _))| *node == known.node);
            let serials = of_node.map(|(serial, _)| serial.clone()).collect();
            Enrolment { serials, ..known.clone() }
        };
        Ok(tables.nodes.values().map(with_serials).collect())
    }

    async fn add_certificate(&self, node: &NodeName, issued: Issued, now_ms: u64) -> Result<bool> {
        let mut tables = self.enrolments.lock();
        if tables.nodes.get(node).is_some_and(|known| known.revoked_ms > 0) {
            return Ok(false);
        }
        tables.add(node, issued, now_ms);
        Ok(true)
    }

    async fn revoke_node(&self, node: &NodeName, now_ms: u64) -> Result<()> {
        let mut tables = self.enrolments.lock();
        tables.tokens.retain(|_, token| token.node != *node);
        tables.certificates.retain(|_, (of, _)| of != node);
        let known = tables.nodes.entry(node.clone()).or_insert_with(|| Enrolment {
            node: node.clone(),
            address: String::new(),
            pool: String::new(),
            joined_ms: 0,
            revoked_ms: 0,
            only_listed: true,
            serials: Vec::new(),
        });
        (known.revoked_ms, known.only_listed) = (now_ms, true);
        Ok(())
    }
}
