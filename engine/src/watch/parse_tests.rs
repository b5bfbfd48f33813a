use std::io::Cursor;
use std::time::Instant;

use procfs::net::{TcpNetEntries, TcpState};
use procfs::{FromBufReadSI, SystemInfoInterface};
use proptest::prelude::*;

use super::*;

const V6_LOOPBACK: &str = "00000000000000000000000001000000";
const V6_ANY: &str = "00000000000000000000000000000000";
const HEADER: &str =
    "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";

/// The wire's answer, as `port/address` items. The literals of these tests are those of a little-endian machine.
fn wire(tcp: &str, tcp6: &str) -> String {
    let words = wire_listeners(tcp.as_bytes(), tcp6.as_bytes());
    let words: Vec<_> = words.iter().map(|w| format!("{}/{}", w.port, w.bind_addr.as_str())).collect();
    words.join(" ")
}

fn kernel_row(local: &str, state: &str) -> String {
    format!(
        "   0: {local} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000  1000        0 24713 1 0 100 0 0 10 0\n"
    )
}

#[test]
fn empty_input_has_no_listener() {
    assert_eq!(wire("", ""), "");
}

#[test]
fn header_rows_are_passed_over() {
    assert_eq!(wire(HEADER, HEADER), "");
}

#[cfg(target_endian = "little")]
#[test]
fn each_address_of_the_wire_specification_has_its_answer() {
    let cases = [
        ("0100007F:1F90", "8080/127.0.0.1"),
        ("0100007f:1f90", "8080/127.0.0.1"),
        ("00000000:1435", "5173/0.0.0.0"),
        (&format!("{V6_LOOPBACK}:0BB8"), "3000/127.0.0.1"),
        (&format!("{V6_ANY}:0BB8"), "3000/0.0.0.0"),
        ("0202A8C0:1F90", ""),
        ("0200007F:1F90", ""),
        ("3500007F:0035", ""),
        ("0000000000000000FFFF00000100007F:1F90", ""),
        ("0100007F:0000", ""),
        ("0100007F:12345", ""),
        ("0100007F:01F90", ""),
        ("0100007F:1F9Z", ""),
        ("0100007F:0x50", ""),
        ("0100007F:+50", ""),
        ("0100007F:", ""),
        (":1F90", ""),
        ("0100007F", ""),
        ("0100007F:0:1F90", ""),
        ("0:1F90", ""),
        ("0100007F:FFFF", "65535/127.0.0.1"),
        ("0100007F:1", "1/127.0.0.1"),
    ];
    for (local, answer) in cases {
        assert_eq!(wire(&kernel_row(local, "0A"), ""), answer, "{local}, IPv4 file");
        assert_eq!(wire("", &kernel_row(local, "0A")), answer, "{local}, IPv6 file");
    }
}

#[test]
fn only_the_exact_state_0a_counts() {
    for state in ["01", "0a", "A", "00A", "0A0", "06", "st"] {
        assert_eq!(wire(&kernel_row("0100007F:1F90", state), ""), "", "{state}");
    }
}

#[cfg(target_endian = "little")]
#[test]
fn rows_keep_the_order_of_the_table() {
    let text = kernel_row("00000000:1F90", "0A") + &kernel_row("0100007F:1435", "0A");
    assert_eq!(wire(&text, ""), "8080/0.0.0.0 5173/127.0.0.1");
}

#[cfg(target_endian = "little")]
#[test]
fn a_port_in_both_files_is_one_entry_that_prefers_loopback_and_keeps_its_place() {
    let tcp = kernel_row("00000000:1435", "0A") + &kernel_row("00000000:0050", "0A");
    assert_eq!(wire(&tcp, &kernel_row(&format!("{V6_LOOPBACK}:1435"), "0A")), "5173/127.0.0.1 80/0.0.0.0");
    assert_eq!(wire(&tcp, &kernel_row(&format!("{V6_ANY}:1435"), "0A")), "5173/0.0.0.0 80/0.0.0.0");
}

#[test]
fn malformed_rows_are_passed_over() {
    let text = "garbage\n  0: nope 0:0 0A\n 0: 0100007F:1F90 00000000:0000\n\n   \n\0\0\n 0 1 2 0A\n: : : 0A";
    assert_eq!(wire(text, text), "");
}

#[cfg(target_endian = "little")]
#[test]
fn four_columns_are_enough() {
    assert_eq!(wire("0: 0100007F:1F90 00000000:0000 0A", ""), "8080/127.0.0.1");
    let row = rows(b"0: 0100007F:1F90 00000000:0000 0A").next().unwrap();
    assert_eq!((row.inode, row.uid), (INODE_UNKNOWN, UID_UNKNOWN));
    let row = rows(b"0: 0100007F:1F90 x 0A x x x 99999999999 x 99999999999999999999 1").next().unwrap();
    assert_eq!((row.inode, row.uid), (INODE_UNKNOWN, UID_UNKNOWN));
}

#[cfg(target_endian = "little")]
#[test]
fn carriage_returns_nul_bytes_and_broken_utf8_elsewhere_change_nothing() {
    let row = kernel_row("0100007F:1F90", "0A");
    let crlf = (HEADER.to_owned() + &row).replace('\n', "\r\n");
    assert_eq!(wire(&crlf, &crlf), "8080/127.0.0.1");
    let mut bytes = b"\0\xff\xfe\n\xc3\x28 \0 \0 0A\n".to_vec();
    bytes.extend_from_slice(row.trim_end().as_bytes());
    bytes.extend_from_slice(b" \0 \xff\n");
    assert_eq!(wire_listeners(&bytes, b"\0\xff").len(), 1);
}

#[cfg(target_endian = "little")]
#[test]
fn rows_keep_address_owner_and_inode() {
    let tcp = kernel_row("00000000:1435", "0A") + &kernel_row("0100007F:1435", "0A");
    let tcp6 =
        kernel_row(&format!("{V6_LOOPBACK}:1435"), "0A") + &kernel_row(&format!("{V6_ANY}:1435"), "0A");
    let reading = listeners(tcp.as_bytes(), tcp6.as_bytes());
    let addresses: Vec<_> = reading.rows().iter().map(|row| row.address.to_string()).collect();
    assert_eq!(addresses, ["0.0.0.0", "127.0.0.1", "::1", "::"]);
    assert!(reading.rows().iter().all(|row| (row.port.get(), row.inode, row.uid) == (5173, 24713, 1000)));
}

#[test]
fn words_are_in_the_byte_order_of_the_machine() {
    let read = |text: &str, octets| address(text.as_bytes(), octets).unwrap().to_string();
    assert_eq!(read("0100007F", u32::to_le_bytes), "127.0.0.1");
    assert_eq!(read("7F000001", u32::to_be_bytes), "127.0.0.1");
    assert_eq!(read(V6_LOOPBACK, u32::to_le_bytes), "::1");
    assert_eq!(read("00000000000000000000000000000001", u32::to_be_bytes), "::1");
}

#[test]
fn established_rows_end_the_listeners_and_half_open_rows_do_not() {
    let past = |line: &str| is_past_listeners(line.as_bytes());
    assert!(past(&kernel_row("0100007F:1F90", "01")) && past(&kernel_row("0100007F:1F90", "06")));
    assert!(!past(&kernel_row("0100007F:1F90", "0A")) && !past(&kernel_row("0100007F:1F90", "03")));
    assert!(!past(HEADER) && !past("") && !past("a b c"));
}

/// A quadratic parser would need minutes for this.
#[test]
fn hostile_text_takes_linear_time() {
    let started = Instant::now();
    for bytes in [b" ".as_slice(), b":", b"0", b"a ", b"\n", b"0A ", b"0:0 "] {
        assert_eq!(rows(&bytes.repeat(4 << 20)).count(), 0);
    }
    let every_port: String =
        (0..=u16::MAX).map(|port| kernel_row(&format!("0100007F:{port:04X}"), "0A")).collect();
    assert_eq!(wire_listeners(every_port.as_bytes(), every_port.as_bytes()).len(), 65_535);
    assert!(started.elapsed().as_secs() < 60, "took {:?}", started.elapsed());
}

/// The parameters of the machine for the other parser.
struct Machine;

impl SystemInfoInterface for Machine {
    fn boot_time_secs(&self) -> procfs::ProcResult<u64> {
        Ok(0)
    }
    fn ticks_per_second(&self) -> u64 {
        100
    }
    fn page_size(&self) -> u64 {
        4096
    }
    fn is_little_endian(&self) -> bool {
        cfg!(target_endian = "little")
    }
}

/// The rows of sockets as the kernel prints them.
fn kernel_rows() -> impl Strategy<Value = String> {
    let word = prop_oneof![
        Just(u32::from_ne_bytes([127, 0, 0, 1])),
        Just(0),
        Just(u32::from_ne_bytes([0, 0, 0, 1])),
        Just(u32::from_ne_bytes([0, 0, 0xff, 0xff])),
        any::<u32>(),
    ];
    let port = prop_oneof![0u16..4, any::<u16>()];
    let state = prop_oneof![Just(10u8), 1u8..13];
    let row = (prop::collection::vec(word, 4), any::<bool>(), port, state, any::<u32>(), any::<u32>());
    let row = row.prop_map(|(words, v6, port, state, uid, inode)| {
        let words = if v6 { &words[..] } else { &words[..1] };
        let address: String = words.iter().map(|word| format!("{word:08X}")).collect();
        let remote = "0".repeat(address.len());
        format!(
            "{address}:{port:04X} {remote}:0000 {state:02X} 00000000:00000000 00:00000000 00000000 {uid:5}        0 {inode} 1 0000000000000000 100 0 0 10 0"
        )
    });
    prop::collection::vec(row, 0..40).prop_map(|rows| {
        let rows = rows.iter().enumerate().map(|(index, row)| format!("{index:4}: {row:<149}\n"));
        HEADER.to_owned() + &rows.collect::<String>()
    })
}

proptest! {
    #[test]
    fn the_procfs_crate_reads_the_same_from_rows_of_the_kernel(text in kernel_rows()) {
        let theirs = TcpNetEntries::from_buf_read(Cursor::new(text.as_bytes()), &Machine).unwrap().0;
        let theirs: Vec<_> = theirs
            .into_iter()
            .filter(|row| row.state == TcpState::Listen && row.local_address.port() != 0)
            .map(|row| (row.local_address.port(), octets(row.local_address.ip()), row.uid, row.inode))
            .collect();
        let ours: Vec<_> =
            rows(text.as_bytes()).map(|row| (row.port.get(), octets(row.address), row.uid, row.inode)).collect();
        prop_assert_eq!(ours, theirs);
    }

    #[test]
    fn arbitrary_bytes_neither_panic_nor_give_more_rows_than_lines(tcp: Vec<u8>, tcp6: Vec<u8>) {
        let lines = tcp.split(|&byte| byte == b'\n').count() + tcp6.split(|&byte| byte == b'\n').count();
        prop_assert!(wire_listeners(&tcp, &tcp6).len() <= lines);
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}
