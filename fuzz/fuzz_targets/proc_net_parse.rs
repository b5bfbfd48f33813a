//! The text of `/proc/net/tcp[6]`, with three properties:
//! - any bytes: no panic, bounded output, and the result of a simple implementation of the wire specification (A.4);
//! - split at any newline, as the two files are: the same result;
//! - the same bytes as numbers, printed in the kernel's format: the result of the `procfs` crate.

#![no_main]

use std::io::Cursor;
use std::net::IpAddr;

use landfall_engine::watch::parse::{BindAddr, listeners, rows, wire_listeners};
use libfuzzer_sys::fuzz_target;
use procfs::net::{TcpNetEntries, TcpState};
use procfs::{ExplicitSystemInfo, FromBufReadSI};

fuzz_target!(|data: &[u8]| {
    agrees_with_the_specification(data);
    agrees_with_procfs(data);
});

fn agrees_with_the_specification(data: &[u8]) {
    let ours: Vec<_> = wire_listeners(data, b"").iter().map(|w| (w.port.get(), w.bind_addr)).collect();
    assert_eq!(ours, naive(data));
    assert!(ours.len() <= 65_535);
    let reading = listeners(data, b"");
    assert!(reading.rows().len() <= 4 * 65_535 && reading.rows().len() <= rows(data).count());
    for row in reading.rows() {
        assert!(row.address.is_loopback() || row.address.is_unspecified());
        assert_eq!(reading.at((row.port, row.address)), Some(row));
    }
    if let Some(middle) = data.iter().position(|&byte| byte == b'\n') {
        let (tcp, tcp6) = (&data[..middle], &data[middle + 1..]);
        assert_eq!(wire_listeners(tcp, tcp6), wire_listeners(data, b""));
    }
}

/// A literal implementation of the specification, without regard to speed.
fn naive(data: &[u8]) -> Vec<(u16, BindAddr)> {
    let mut found: Vec<(u16, BindAddr)> = Vec::new();
    for line in data.split(|&byte| byte == b'\n') {
        // Each byte becomes one character, so that bytes which are not UTF-8 count as unknown characters.
        let line: String =
            line.iter().map(|&byte| if byte.is_ascii() { char::from(byte) } else { '?' }).collect();
        let space = |c: char| matches!(c, ' ' | '\t' | '\r' | '\u{b}' | '\u{c}');
        let columns: Vec<&str> = line.split(space).filter(|column| !column.is_empty()).collect();
        if columns.len() < 4 || columns[3] != "0A" {
            continue;
        }
        let Some((ip, port)) = columns[1].rsplit_once(':') else { continue };
        if port.is_empty() || port.len() > 4 || !port.chars().all(|c| c.is_ascii_hexdigit()) {
            continue;
        }
        let port = u16::from_str_radix(port, 16).expect("four digits fit");
        let bind_addr = match ip.to_ascii_uppercase().as_str() {
            "00000000" | "00000000000000000000000000000000" => BindAddr::Any,
            "0100007F" | "00000000000000000000000001000000" => BindAddr::Loopback,
            _ => continue,
        };
        match found.iter_mut().find(|known| known.0 == port) {
            _ if port == 0 => {}
            None => found.push((port, bind_addr)),
            Some(known) if bind_addr == BindAddr::Loopback => known.1 = bind_addr,
            Some(_) => {}
        }
    }
    found
}

fn agrees_with_procfs(data: &[u8]) {
    let text = kernel_text(data);
    let machine = ExplicitSystemInfo {
        boot_time_secs: 0,
        ticks_per_second: 100,
        page_size: 4096,
        is_little_endian: cfg!(target_endian = "little"),
    };
    let theirs = TcpNetEntries::from_buf_read(Cursor::new(&text), &machine).expect("rows of the kernel").0;
    let theirs: Vec<_> = theirs
        .iter()
        .filter(|row| row.state == TcpState::Listen && row.local_address.port() != 0)
        .map(|row| (row.local_address.port(), row.local_address.ip(), row.uid, row.inode))
        .collect();
    let ours: Vec<(u16, IpAddr, u32, u64)> =
        rows(text.as_bytes()).map(|row| (row.port.get(), row.address, row.uid, row.inode)).collect();
    assert_eq!(ours, theirs);
}

/// Formatting takes most of the time of a run; this many rows cover every pair of neighbours.
const ROWS_MAX: usize = 12;

/// Formats one row for each 27 bytes.
fn kernel_text(data: &[u8]) -> String {
    let mut text =
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
            .to_owned();
    for (index, row) in data.chunks_exact(27).take(ROWS_MAX).enumerate() {
        let word = |at: usize| u32::from_ne_bytes(row[at..at + 4].try_into().expect("four bytes"));
        let words = if row[0] & 1 == 0 { 1 } else { 4 };
        // Half of the rows listen on a relevant address; the state is one that the kernel uses.
        let address: String = (0..words)
            .map(|i| match (row[0] & 6, i) {
                (2, _) => 0,
                (4, 0) if words == 1 => u32::from_ne_bytes([127, 0, 0, 1]),
                (4, 3) => u32::from_ne_bytes([0, 0, 0, 1]),
                (4, _) => 0,
                _ => word(1 + 4 * i),
            })
            .map(|word| format!("{word:08X}"))
            .collect();
        let state = if row[0] & 8 == 0 { 10 } else { row[17] % 12 + 1 };
        let port = u16::from_ne_bytes([row[18], row[19]]);
        let (uid, inode) =
            (word(20), u32::from(row[24]) << 16 | u32::from(row[25]) << 8 | u32::from(row[26]));
        let remote = "0".repeat(address.len());
        let columns = format!(
            "{index:4}: {address}:{port:04X} {remote}:0000 {state:02X} 00000000:00000000 00:00000000 00000000 {uid:5}        0 {inode} 1 0000000000000000 100 0 0 10 0"
        );
        text.push_str(&format!("{columns:<149}\n"));
    }
    text
}
