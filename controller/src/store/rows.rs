//! Converts rows of the store's tables to values, and back.

use daemon::seal::Key;
use rusqlite::{Error::FromSqlConversionFailure, types::Type};

use super::{Row, State, sealed};

/// Returns the stored name of a state.
pub(super) fn state(state: State) -> &'static str {
    match state {
        State::Placing => "placing",
        State::Done => "done",
        State::Failed => "failed",
    }
}

/// Parses a text column. We wrote it, so a value that does not parse means a damaged file.
pub(super) fn parsed<T: std::str::FromStr>(
    row: &rusqlite::Row<'_>,
    at: usize,
) -> rusqlite::Result<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    row.get::<_, String>(at)?
        .parse()
        .map_err(|error| FromSqlConversionFailure(at, Type::Text, Box::new(error)))
}

/// Reads a creation; its request is empty when the key did not seal it.
pub(super) fn to_row(row: &rusqlite::Row<'_>, key: &Key) -> rusqlite::Result<Row> {
    let (id, request): (String, Vec<u8>) = (row.get(0)?, row.get(4)?);
    let (node, user): (Option<String>, String) = (row.get(6)?, row.get(14)?);
    Ok(Row {
        id: parsed(row, 0)?,
        team: parsed(row, 1)?,
        user: (!user.is_empty()).then(|| parsed(row, 14)).transpose()?,
        request_id: parsed(row, 2)?,
        digest: row.get(3)?,
        request: sealed::open_request(key, &id, &request).into(),
        state: match row.get::<_, String>(5)?.as_str() {
            "placing" => State::Placing,
            "done" => State::Done,
            _ => State::Failed,
        },
        node: node.is_some().then(|| parsed(row, 6)).transpose()?,
        attempt: row.get(7)?,
        decision: row.get(8)?,
        cancelled: row.get(9)?,
        released: row.get(10)?,
        created_ms: row.get(11)?,
        ended_ms: row.get(12)?,
        last: row.get(13)?,
    })
}
