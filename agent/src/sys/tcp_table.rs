//! The kernel's tables of TCP sockets, `net/tcp` and `net/tcp6` of a network namespace.

use std::path::Path;

use procfs::{
    FromBufReadSI, current_system_info,
    net::{TcpNetEntries, TcpNetEntry, TcpState},
};

use super::read;

/// Returns the sockets of a table that listen; none when it cannot be read. The kernel lists these first, so
/// the first `max` bytes of a long table are enough.
pub fn listening(table: &Path, max: u64) -> Vec<TcpNetEntry> {
    let bytes = read::head(table, max).unwrap_or_default();
    // A line that was cut off would spoil the rest.
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(&[][..], |end| &bytes[..=end]);
    let sockets = TcpNetEntries::from_buf_read(whole, current_system_info());
    let mut sockets = sockets.map(|sockets| sockets.0).unwrap_or_default();
    sockets.retain(|socket| socket.state == TcpState::Listen);
    sockets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listening_sockets_are_found_also_in_a_table_that_is_cut_off() {
        let dir = tempfile::tempdir().expect("a directory");
        let table = dir.path().join("tcp");
        let text = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
   0: 0100007F:2120 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0  0 11 1 0 100 0 0 10 0\n\
   1: 0100007F:2120 0100007F:9999 01 00000000:00000000 00:00000000 00000000  0  0 12 1 0 100 0 0 10 0\n\
   2: 00000000:2121 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0  0 13 1 0 100 0 0 10 0\n";
        std::fs::write(&table, text).expect("written");
        let inodes =
            |max| listening(&table, max).iter().map(|socket| socket.inode).collect::<Vec<_>>();
        assert_eq!(inodes(read::LARGE), [11, 13]);
        let cut = u64::try_from(text.len()).expect("small") - 70;
        assert_eq!(inodes(cut), [11]);
        assert_eq!(inodes(5), [0; 0]);
        assert_eq!(listening(&dir.path().join("none"), 5).len(), 0);
    }
}
